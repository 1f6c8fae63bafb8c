"""Everything that is not about distillation."""

from harness.cli import (
    BIG,
    MANY,
    MOST_THREADS,
    TINY,
    Parser,
    check_creatable,
    check_new_file,
    complain,
    first_line,
    number,
    path_name,
    write_new_file,
)
from harness.data import check_fit, from_records, load_problems, pad_id, render_prompts, stop_ids
from harness.machine import check_device, surroundings
from harness.models import (
    check_head,
    check_sampling,
    common_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
)
