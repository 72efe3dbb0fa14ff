"""Runs that recover by themselves: ranks that tell where they are, an agent on every node that
starts and watches them, and one supervisor that decides.

Nothing here imports torch but what the ranks themselves run.
"""
