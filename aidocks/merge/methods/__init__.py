"""The merge methods, one a file. None imports torch at its top: requests are checked where there is none."""
