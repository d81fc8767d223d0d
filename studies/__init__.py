"""Side-by-side studies: several methods on the same images, one table and one page.

    python -m studies run studies/shapes.yaml      # train what is missing
    python -m studies report runs/shapes           # summary.md, CSV files, report.html

`study` reads the YAML, `plan` resolves it, `run` starts the projects' own `train.sh` (`cluster` hands them to Slurm),
`table` reads run directories and computes the figures, `summary` writes them as Markdown and CSV, `pictures` asks the
projects' `predict` for masks, and `charts`, `tiles`, `style` and `page` make `report.html` from the files in `assets`.
"""
