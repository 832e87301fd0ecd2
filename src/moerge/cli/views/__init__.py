"""Views: print results of commands, one module for each module of commands."""
