"""Who this process is: what the launcher says, the hosts and addresses, and how the ranks find each other."""
