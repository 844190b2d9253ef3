"""The formats of other tools, as a checkpoint is exported to and imported from them: one file for each."""
