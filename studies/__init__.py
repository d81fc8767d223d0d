"""Side-by-side studies: several methods on the same images, one table and one page.

    python -m studies run studies/shapes_3seeds.yaml      # train what is missing
    python -m studies report runs/shapes_3seeds           # summary.md, summary.csv, report.html

`study` reads the YAML, `run` starts the projects' own `train.sh`, `table` reads run directories and computes the
figures, `pictures` asks the projects' `predict` for masks, `charts` and `page` draw `report.html`.
"""
