"""What the layers of a trunk compute on rollouts laid out as prefix trees: the layout, and the kernels of attention."""
