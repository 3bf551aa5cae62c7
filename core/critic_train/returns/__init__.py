"""From rewards to what a critic is trained on: returns, and the advantages a policy is trained on."""
