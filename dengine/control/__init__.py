"""Let all ranks leave together: stops, failures and stalls, over a store and separate threads, never by collectives."""
