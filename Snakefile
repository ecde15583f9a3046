# Postgres -> results/export -> results/select -> results/encode -> results/aggregate -> pgvector
#
# results/<rule>/...     what the rule writes; <shard> is N-of-M, all images of a listing in one
# logs/<rule>/...        what it said
#
# Targets: all (default) · selected (stage one) · vectors (the dry run) · benchmark
import os
import sys

from snakemake.utils import min_version

sys.path.insert(0, workflow.basedir)

from pipeline.lifetime import end_stages_on_signals
from pipeline.workflow import Workflow, code, lock_folder, run_this_checkout

min_version("9.11")
run_this_checkout()


if os.path.exists("config.yaml"):

    configfile: "config.yaml"


flow = Workflow(config)
settings = flow.settings


envvars:
    "PG_DSN",


scattergather:
    encode=settings.shards,


localrules:
    all,
    selected,
    vectors,


onstart:
    lock_folder()
    end_stages_on_signals()


onsuccess:
    shell("python -m pipeline summary")


rule all:
    """Every pending listing in the table."""
    input:
        flow.table,


rule selected:
    """Stage one: all that needs the database before the load."""
    input:
        gather.encode("results/select/{scatteritem}.parquet"),


rule vectors:
    """The dry run: everything but the load."""
    input:
        "results/aggregate/listing_vectors.parquet",


rule export:
    """Snapshot what is pending."""
    output:
        listings="results/export/listings.parquet",
        images="results/export/images.parquet",
    log:
        "logs/export.log",
    conda:
        "environment.yml"
    resources:
        lock_timeout_s=settings.lock_timeout_s,
        cache_dir=settings.cache_dir,
    params:
        settings=flow.export,
        code=code("export"),
    shell:
        "python -m pipeline.export"
        " --listings {output.listings:q} --images {output.images:q}"
        " {params.settings}"
        " --lock-timeout-s {resources.lock_timeout_s} --cache-dir {resources.cache_dir:q}"
        " 2>&1 | tee {log:q}"


rule select:
    """Top-K images, sharded."""
    input:
        listings="results/export/listings.parquet",
        images="results/export/images.parquet",
    output:
        shards=scatter.encode("results/select/{scatteritem}.parquet"),
    log:
        "logs/select.log",
    conda:
        "environment.yml"
    params:
        settings=flow.select,
        code=code("select"),
    shell:
        "python -m pipeline.select"
        " --listings {input.listings:q} --images {input.images:q} --outputs {output.shards:q}"
        " --prune results/select results/encode"
        " {params.settings}"
        " 2>&1 | tee {log:q}"


rule encode:
    """Images to unit vectors."""
    input:
        selected="results/select/{scatteritem}.parquet",
    output:
        encoded="results/encode/{scatteritem}.parquet",
        stats="results/encode/{scatteritem}.json",
    log:
        "logs/encode/{scatteritem}.log",
    conda:
        "environment.yml"
    threads: 16
    resources:
        gpu=1,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        device=settings.device,
        cache_dir=settings.cache_dir,
    params:
        settings=flow.encode,
        code=code("encode"),
    shell:
        "python -m pipeline.encode"
        " --selected {input.selected:q} --encoded {output.encoded:q} --stats {output.stats:q}"
        " {params.settings}"
        " --batch-size {resources.batch_size} --num-workers {resources.num_workers}"
        " --device {resources.device} --threads {threads} --cache-dir {resources.cache_dir:q}"
        " 2>&1 | tee {log:q}"


rule aggregate:
    """Listing vectors."""
    input:
        encoded=gather.encode("results/encode/{scatteritem}.parquet"),
        images="results/export/images.parquet",
    output:
        vectors="results/aggregate/listing_vectors.parquet",
        failures="results/aggregate/failures.json",
    log:
        "logs/aggregate.log",
    conda:
        "environment.yml"
    resources:
        mem_mb=settings.memory_mb,
    params:
        settings=flow.aggregate,
        code=code("aggregate"),
    shell:
        "python -m pipeline.aggregate"
        " --encoded {input.encoded:q} --images {input.images:q}"
        " --output {output.vectors:q} --failures {output.failures:q}"
        " {params.settings}"
        " --memory-mb {resources.mem_mb}"
        " 2>&1 | tee {log:q}"


rule load:
    """COPY and merge."""
    input:
        vectors="results/aggregate/listing_vectors.parquet",
        failures="results/aggregate/failures.json",
        listings="results/export/listings.parquet",
    output:
        receipt="results/load/receipt.json",
    log:
        "logs/load.log",
    conda:
        "environment.yml"
    resources:
        lock_timeout_s=settings.lock_timeout_s,
        cache_dir=settings.cache_dir,
    params:
        settings=flow.load,
        code=code("load"),
    shell:
        "python -m pipeline.load"
        " --vectors {input.vectors:q} --failures {input.failures:q} --listings {input.listings:q}"
        " --receipt {output.receipt:q}"
        " {params.settings}"
        " --lock-timeout-s {resources.lock_timeout_s} --cache-dir {resources.cache_dir:q}"
        " 2>&1 | tee {log:q}"


rule benchmark:
    """Time a sample shard."""
    input:
        selected=gather.encode("results/select/{scatteritem}.parquet")[0],
    output:
        report="results/benchmark/benchmark.json",
    log:
        "logs/benchmark.log",
    conda:
        "environment.yml"
    threads: 16
    resources:
        gpu=1,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        device=settings.device,
    params:
        settings=flow.benchmark,
        code=code("benchmark"),
    shell:
        "python -m pipeline.benchmark"
        " --selected {input.selected:q} --report {output.report:q}"
        " {params.settings}"
        " --batch-size {resources.batch_size} --num-workers {resources.num_workers}"
        " --device {resources.device} --threads {threads}"
        " 2>&1 | tee {log:q}"
