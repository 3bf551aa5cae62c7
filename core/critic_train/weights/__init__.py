"""The weights of a critic: read from a directory and written to one, whole or over ranks; adapters on them."""
