# Nothing imports this folder: recipes run by path. The file exists because torchtune's wheel claims the package name
# `recipes` with an __init__ that raises, and an own (empty) one keeps `python -m recipes.x` from finding that one first.
