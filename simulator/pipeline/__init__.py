"""Pipeline orders: which rank runs which stage on which micro-batch, in which order; the times of an order alone."""
