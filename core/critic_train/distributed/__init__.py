"""One run on several processes: who they are, how they agree, how work and weights are shared out."""
