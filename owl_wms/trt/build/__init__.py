"""Building a program in a child process: parent, child, worker, candidate, isolation, saving."""
