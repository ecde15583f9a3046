# Postgres -> results/export -> results/select -> results/encode -> results/aggregate -> pgvector
#
# results/<rule>/...     what the rule writes; <shard> is N-of-M, all images of a listing in one
# logs/<rule>/...        what it said
#
# Targets: all (default) · selected (stage one) · vectors (the dry run) · benchmark · evaluate · report · index
#
# params name the settings that decide what a rule writes: one that changes reruns it.
# resources name those that do not. KEY is source, model_rev and pca_rev; PHOTO_LIMITS are
# follow_symlinks, max_image_bytes and max_image_pixels; weights is the hash of the model's,
# projection that of the file of pca.
import sys

from snakemake.utils import min_version

sys.path.insert(0, workflow.basedir)

from pipeline.stage.lifetime import end_stages_on_signals
from pipeline.stage.settings import PHOTO_LIMITS, Identity
from pipeline.workflow.code import code
from pipeline.workflow.hooks import Hooks
from pipeline.workflow.lock import lock_folder
from pipeline.workflow.machine import AGGREGATE_THREADS, memory_request, share
from pipeline.workflow.plan import Workflow, config_file, run_this_checkout

min_version("9.11")
run_this_checkout()

found = config_file()

if found:

    configfile: found


flow = Workflow(config, workflow.configfiles, workflow.config_settings.config)
settings = flow.settings
KEY = Identity._fields
this_run = Hooks(flow, workflow)


envvars:
    "PG_DSN",


shards = flow.shards(workflow)
each = share(workflow, settings, shards)


scattergather:
    encode=shards,


# A target asks for every file on its way: Snakemake notes a job that failed as done and removes its
# files, and would not miss them while what follows from an earlier run is there.
EXPORTED = ["results/export/listings.parquet", "results/export/images.parquet"]
SELECTED = [*EXPORTED, *gather.encode("results/select/{scatteritem}.parquet")]
ENCODED = [*SELECTED, *gather.encode("results/encode/{scatteritem}.parquet")]
AGGREGATED = [
    *ENCODED,
    "results/aggregate/listing_vectors.parquet",
    "results/aggregate/without_vector.parquet",
]


# On a cluster, what reaches the database runs here: a node gets no PG_DSN, and one that planned
# the export anew would record another state of the database.
localrules:
    all,
    selected,
    vectors,
    export,
    load,
    report,
    index,


onstart:
    lock_folder()
    end_stages_on_signals()


onsuccess:
    this_run.succeeded()


onerror:
    this_run.failed()


rule all:
    """Every pending listing in the table."""
    input:
        flow.table(AGGREGATED),
        workflow.main_snakefile,  # a target that asks for no file at all would run each time


rule selected:
    """Stage one: all that needs the database before the load."""
    input:
        SELECTED,


rule vectors:
    """The dry run: everything but the load."""
    input:
        AGGREGATED,


rule export:
    """Snapshot what is pending."""
    output:
        listings="results/export/listings.parquet",
        images="results/export/images.parquet",
    log:
        "logs/export.log",
    retries: 0
    conda:
        "environment.yml"
    resources:
        lock_timeout_s=settings.lock_timeout_s,
        cache_dir=settings.cache_dir,
    params:
        settings=flow.export("limit_listings", "force", *KEY, *PHOTO_LIMITS),
        code=code("export"),
    shell:
        "python -m pipeline.export"
        " --listings {output.listings:q} --images {output.images:q}"
        " {params.settings}"
        " --lock-timeout-s {resources.lock_timeout_s} --cache-dir {resources.cache_dir:q}"
        " --log {log:q}"


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
    resources:
        shards=shards,
    params:
        settings=flow.flags("topk", "exclude_stock", "exclude_screenshots"),
        code=code("select"),
    shell:
        "python -m pipeline.select"
        " --listings {input.listings:q} --images {input.images:q}"
        " --selected results/select --shards {resources.shards}"
        " --prune results/select results/encode"
        " {params.settings}"
        " --log {log:q}"


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
    threads: each.threads
    resources:
        gpu=1,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        device=each.device,
        cache_dir=settings.cache_dir,
        max_failed_fraction=str(settings.max_failed_fraction),
    params:
        settings=flow.flags(
            "model_name",
            "pretrained",
            "weights",
            "precision",
            "decode",
            "apply_exif_orientation",
            *PHOTO_LIMITS,
        ),
        code=code("encode"),
    shell:
        "python -m pipeline.encode"
        " --selected {input.selected:q} --encoded {output.encoded:q} --stats {output.stats:q}"
        " {params.settings}"
        " --batch-size {resources.batch_size} --num-workers {resources.num_workers}"
        " --device {resources.device} --threads {threads} --cache-dir {resources.cache_dir:q}"
        " --max-failed-fraction {resources.max_failed_fraction}"
        " --log {log:q}"


rule aggregate:
    """Listing vectors."""
    input:
        encoded=gather.encode("results/encode/{scatteritem}.parquet"),
        images="results/export/images.parquet",
    output:
        vectors="results/aggregate/listing_vectors.parquet",
        without_vector="results/aggregate/without_vector.parquet",
        failures="results/aggregate/failures.json",
    log:
        "logs/aggregate.log",
    conda:
        "environment.yml"
    threads: AGGREGATE_THREADS
    resources:
        shards=shards,
        mem_mb=memory_request(settings.memory_mb),
        memory_mb=settings.memory_mb,
        max_failed_fraction=str(settings.max_failed_fraction),
        pca=settings.pca,
    params:
        settings=flow.flags(*KEY, "projection"),
        code=code("aggregate"),
    shell:
        "python -m pipeline.aggregate"
        " --encoded results/encode --shards {resources.shards} --images {input.images:q}"
        " --output {output.vectors:q} --without-vector {output.without_vector:q}"
        " --failures {output.failures:q}"
        " {params.settings} --pca={resources.pca:q}"
        " --memory-mb {resources.memory_mb} --max-failed-fraction {resources.max_failed_fraction}"
        " --threads {threads} --log {log:q}"


rule load:
    """COPY and merge."""
    input:
        vectors="results/aggregate/listing_vectors.parquet",
        without_vector="results/aggregate/without_vector.parquet",
        listings="results/export/listings.parquet",
    output:
        receipt="results/load/receipt.json",
    log:
        "logs/load.log",
    retries: 0
    conda:
        "environment.yml"
    resources:
        lock_timeout_s=settings.lock_timeout_s,
        cache_dir=settings.cache_dir,
    params:
        settings=flow.flags(*PHOTO_LIMITS),
        code=code("load"),
    shell:
        "python -m pipeline.load"
        " --vectors {input.vectors:q} --without-vector {input.without_vector:q}"
        " --listings {input.listings:q} --receipt {output.receipt:q}"
        " {params.settings}"
        " --lock-timeout-s {resources.lock_timeout_s} --cache-dir {resources.cache_dir:q}"
        " --log {log:q}"


rule report:
    """Look, don't read."""
    input:
        flow.table(AGGREGATED),
    output:
        page=report(
            "results/report/index.html",
            caption="pipeline/pages/report.rst",
            category="Listing vectors",
        ),
    log:
        "logs/report.log",
    conda:
        "environment.yml"
    resources:
        cache_dir=settings.cache_dir,
    params:
        settings=flow.flags(
            "topk",
            "exclude_stock",
            "exclude_screenshots",
            "apply_exif_orientation",
            *KEY,
            *PHOTO_LIMITS,
        ),
        moment=flow.moment,
    shell:
        "python -m pipeline.report"
        " --output {output.page:q}"
        " {params.settings}"
        " --cache-dir {resources.cache_dir:q}"
        " --log {log:q}"


rule index:
    """HNSW on the loaded vectors."""
    input:
        flow.table(AGGREGATED),
    output:
        report="results/index/index.json",
    log:
        "logs/index.log",
    retries: 0
    conda:
        "environment.yml"
    resources:
        lock_timeout_s=settings.lock_timeout_s,
    params:
        settings=flow.flags(*KEY),
        code=code("index"),
    shell:
        "python -m pipeline.index"
        " --report {output.report:q}"
        " {params.settings}"
        " --lock-timeout-s {resources.lock_timeout_s}"
        " --log {log:q}"


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
    threads: each.threads
    resources:
        gpu=1,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        device=each.device,
    params:
        settings=flow.flags(
            "model_name",
            "pretrained",
            "weights",
            "precision",
            "decode",
            "apply_exif_orientation",
            *PHOTO_LIMITS,
            "benchmark_images",
        ),
        code=code("benchmark"),
    shell:
        "python -m pipeline.benchmark"
        " --selected {input.selected:q} --report {output.report:q}"
        " {params.settings}"
        " --batch-size {resources.batch_size} --num-workers {resources.num_workers}"
        " --device {resources.device} --threads {threads}"
        " --log {log:q}"


rule evaluate:
    """Halves that find each other."""
    input:
        encoded=gather.encode("results/encode/{scatteritem}.parquet"),
        images="results/export/images.parquet",
    output:
        report="results/evaluate/evaluate.json",
        page=report(
            "results/evaluate/index.html",
            caption="pipeline/pages/evaluate.rst",
            category="Listing vectors",
        ),
    log:
        "logs/evaluate.log",
    conda:
        "environment.yml"
    threads: each.threads
    resources:
        shards=shards,
        mem_mb=memory_request(settings.memory_mb),
        memory_mb=settings.memory_mb,
    params:
        settings=flow.flags("apply_exif_orientation", *PHOTO_LIMITS),
        code=code("evaluate"),
    shell:
        "python -m pipeline.evaluate"
        " --encoded results/encode --shards {resources.shards} --images {input.images:q}"
        " --report {output.report:q} --page {output.page:q}"
        " {params.settings}"
        " --memory-mb {resources.memory_mb} --threads {threads}"
        " --log {log:q}"
