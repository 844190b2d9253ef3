"""All states of all metrics in one all-reduce."""
