"""What a process has to do with what is around it: its terminal, its peers, and the libraries that it imports."""
