"""Data as people look at them: numbers and drawings of whole sets, and rows as a page.

Nothing here decides what is trained on; it shows what the loader and the planner give.
"""
