"""Official archives or unpacked folders -> the layouts that `splits/<dataset>/dataset.yaml` describe.

`python -m splits prepare voc|cityscapes|coco|pascal_context --source DIR --out DIR [--download] [--check]`
"""
