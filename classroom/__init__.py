"""
What a class looks at: pages that a browser shows, made of what runs left on disk.

    page        one file of HTML        stages      commands, each done once and remembered
    chapters    what a section is       pictures    drawn from rows of numbers
    base        of the base model       assistant   of what is made of it
    published   the report's numbers, with their places
    watch       what a model did at every token of a text
    microscope  that as a page, with microscope.js and microscope.css

Not here  what is shown: report.py and look.py at the top
"""
