"""Work of a CUDA device recorded and replayed: the pieces of a graph between the nodes that move memory, as CUDA graphs."""
