"""What a rank does while it starts, as it stands after "while". Standard library only."""

IMPORTING = "importing its libraries"
JOINING = "joining the process group"
TOKENIZER = "loading the tokenizer"
DATA = "reading the data"
WEIGHTS = "loading the weights"
TALKING = "talking to the other ranks"
WAITING = "waiting for the other ranks"

WITH_OTHERS = (JOINING, TALKING, WAITING)
"""How those begin in which a rank may only wait for another one."""
