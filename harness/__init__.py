"""Everything that is not about distillation."""

from harness.cli import (
    BIG,
    MANY,
    MOST_THREADS,
    TINY,
    Parser,
    check_creatable,
    complain,
    first_line,
    number,
    path_name,
)
from harness.data import (
    check_fit,
    download_punkt,
    from_records,
    load_problems,
    pad_id,
    render_prompts,
    stop_ids,
)
from harness.models import check_head, common_vocabulary, load_config, load_model, load_tokenizer
