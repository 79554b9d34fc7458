from fastgpt.cli import main

main()
