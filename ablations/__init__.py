"""
Figures of the reports, made again small: a grid of cells, differences paired by seed, a verdict for
each claim.

    figure    what is varied and claimed, and what the receipts hold
    lab       the grid: receipts, resuming, the command line; cells: a process each
    age       which code made a row
    verdict   from differences to one of three verdicts
    small     the small trainings that most cells are
    draw      the pictures
    fig_*     a figure each;   python -m ablations   lists them all
"""
