"""The commands of `genevolve-fast`, a module a subject; each adds its parsers with `add(command)`."""
