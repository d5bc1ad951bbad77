"""Scores on disk: a Parquet file that also says what the scores were made with.

That is stored in the file's own metadata, under one key. pandas' `DataFrame.attrs` would not do: most operations lose
it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.atomic import replacing
from experiments.statistics.scores import ScoreError

_KEY = b"made"


def write_scores(path: Path, scores: pd.DataFrame, made: Mapping[str, Any]) -> None:
    """Writes scores with what they were `made` with (JSON values), whole or not at all.

    Raises:
        CannotWrite: the disk is full, say.
    """
    table = pa.Table.from_pandas(scores, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: json.dumps(made).encode()})
    with replacing(path) as part:
        pq.write_table(table, part)


def read_scores(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Reads scores -> (scores, what they were made with); the second is empty if the file does not say it.

    Files of earlier versions have it in the `attrs` that pandas stores.

    Raises:
        ScoreError: there is no such file, or it is not a table.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ScoreError(f"{path} cannot be read as a table of scores (.parquet): {error}") from error
    kept = table.schema.metadata or {}
    made = json.loads(kept[_KEY]) if _KEY in kept else json.loads(kept.get(b"pandas", b"{}")).get("attributes", {})
    scores = table.to_pandas()
    scores.attrs = {}
    return scores, made
