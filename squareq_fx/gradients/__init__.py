"""The backward as a graph: what has to be differentiated, one vector-Jacobian product a function, what it reads again."""
