"""Studies: questions asked in miniature, of runs that the trainer makes and the evaluation judges.

`runs` makes and judges them, `report` writes what came out; one file a study beside these.
"""
