"""The command `mvlm`: one file for each subcommand, each imported only when it is called for."""
