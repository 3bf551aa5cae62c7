"""The command `export`: a critic in the classes and key names of another system, loaded back and compared."""
