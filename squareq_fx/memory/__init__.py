"""Device memory before the first step: a module's allocations, counted on tensors that have sizes and no values."""
