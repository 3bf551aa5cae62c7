"""One self-contained HTML page about runs and evaluations: is this critic any good, and where is it wrong?"""
