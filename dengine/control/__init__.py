"""Leave together: stops, failures and stalls, over a store and threads of their own, never over the collectives."""
