"""`compute="auto"`: what w8a8 costs each layer in exactness, what it gains in time on this machine, and who takes it."""
