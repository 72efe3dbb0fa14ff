"""The demo: real handwriting, photographs and print to learn from, and a sheet of its answers."""
