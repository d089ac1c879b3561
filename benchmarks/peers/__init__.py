"""Our runtime and its peers on one machine: the same networks, in turns."""
