"""Everything that is not about distillation, behind one door.

What train.py touches:

    start(argv, FLAGS, METHODS, PRESETS, needs)   checks and loads all, yields a run, saves it
    Needs                                         what the methods read
    ANY, COUNT, POSITIVE, SHARE                   limits of flags
    train_tokens(args, step)                      longest response of a step
    micro_batches(mask_BT, args)                  rows of similar length: yields (rows, columns)
    CONTROL_STREAM                                of random numbers

and of the run:

    args, needs, rank, world                      flags, what the methods read, processes
    model, student, teacher                       `student` gives log-probs of `model`, inside DDP
    tokenizer, splitter, vocab_size, stop_ids, stop_class, pad_id, decode
    optimizer, scheduler, watch                   watch.lap(phase) charges the time to a phase
    steps(), evaluation_due(step), write(line)    the loop: its numbers, the log, checkpoints
    position.step                                 training steps done
    prompts_of(step)                              this process's prompts, number of the first row
    sentences(batch)                              of every response, if a mask asks for them
    skip_overflow(generate), overflow             overflow while sampling: no weight changes
    generator(stream, first_row, per_row)         random numbers that do not depend on processes
    sum(values), gather(rows)                     over all processes
    autocast(), gradients(last)                   around forward and backward
    log_line(...), give_up_or_skip(...)           what a step says; what a bad one leaves behind

A signal (SIGTERM, Ctrl-C, SIGHUP) ends a run at once, in the middle of sampling too, except between
the first change of a weight and the line in the log: there it waits, so that a checkpoint always
belongs to the last line. Files: cli, flags, data, models, pair, processes, shard, lora, plan, run,
log, checkpoint, signals; plot and track, to look at a run.
"""

from fast.decode import decode as fast_decode
from harness.checkpoint import Claim, write_json
from harness.cli import BIG, MANY, MOST_THREADS, TINY, Parser, check_creatable, check_new_file
from harness.cli import complain, first_line, number, path_name, write_new_file
from harness.data import check_fit, download_punkt, from_records, load_problems, pad_id
from harness.data import render_prompts, stop_ids
from harness.flags import ANY, COUNT, MACHINE, POSITIVE, SHARE, add_flags, defaults, left_open
from harness.flags import train_tokens
from harness.models import check_head, check_sampling, check_supported, check_tokens
from harness.models import common_vocabulary, load_config, load_model, load_tokenizer
from harness.pair import StudentLogProbs, check_prompts, open_pair, open_prompts, open_splitter
from harness.pair import student_and_teacher, tell_skipped
from harness.processes import CONTROL_STREAM, EVALUATION_STREAM, Stopwatch, batch_order
from harness.processes import check_device, gather_objects, micro_batches, my_share
from harness.processes import row_generator, surroundings
from harness.run import Needs, Run, start
