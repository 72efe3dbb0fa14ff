"""Ranks to groups: the language mesh and the vision mesh.

`layout` is arithmetic alone and imports neither torch nor the engine; `mesh` makes the process
groups. Import the module you need.
"""
