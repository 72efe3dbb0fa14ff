"""One function per operation: each picks the fastest kernel that the machine has."""
