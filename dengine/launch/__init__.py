"""Who this process is: the launcher's variables, hosts and addresses, and how the ranks find each other."""
