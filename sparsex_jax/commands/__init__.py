"""The commands of `sparsex`, one a module; each has `main(arguments)`."""
