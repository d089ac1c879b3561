"""The families of models that can be exported, one file each."""
