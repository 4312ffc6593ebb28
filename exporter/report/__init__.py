"""One record in, three renderings out: JSON, HTML and JUnit, and a text summary for the command line.

`record` and `text` are light; `page` and `writing` load the template engine and the plot library.
"""
