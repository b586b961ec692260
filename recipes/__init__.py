# Nothing imports this folder: recipes run by path. The file is here because torchtune's wheel claims the package name
# `recipes` with an __init__ that raises, which `python -m recipes.x` would find first.
