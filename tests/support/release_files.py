"""Front matter and JSON of releases."""

import json
import re

import yaml

TAG = "test_ride_resnet.own_data"
SIZE = 32
COMMIT = "0" * 40  # that of a run; while the tree has changes, those of the tests would be refused


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def set_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
