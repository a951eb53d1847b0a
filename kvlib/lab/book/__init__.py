"""The book: lessons with their stored outputs, and pages made from the registry, the tables and the READMEs.

    python -m kvlib.lab.book    write build/site-source, build build/site from it, and check every link; offline

What people write for the book alone is in docs/. Everything else is copied or generated (`kvlib.lab.book.pages`), so
that nothing is said twice; nothing is executed.
"""
