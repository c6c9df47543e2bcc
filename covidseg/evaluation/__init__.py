"""How good the masks are: figures, statistics, the methods compared, and the tables of what came out."""
