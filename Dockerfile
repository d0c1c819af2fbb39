# Two images: `evergreen` for Airflow, its workers and MLflow, and `store` for what they share. Nothing of the machine
# that builds them is in here: an index is a build argument, wheels of your own are a build context (config/wheels).
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# A folder of wheels that are taken before the index's; `--build-context wheels=FOLDER` puts another in its place.
FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS packages
ARG UV_VERSION=0.13.8
ARG UV_DEFAULT_INDEX=https://pypi.org/simple
# cpu | auto | cu130 …: which build of torch, where no wheel of it is given.
ARG TORCH=cpu
ENV UV_LINK_MODE=copy UV_HTTP_TIMEOUT=180 UV_CACHE_DIR=/var/cache/uv
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/uv && /opt/uv/bin/pip install --quiet --index-url "$UV_DEFAULT_INDEX" "uv==$UV_VERSION" \
 && python3 -m venv --without-pip /opt/evergreen
COPY requirements.txt .
# Every package is held to its hash in the lock; torch has none there, for each of its builds has another.
RUN --mount=type=cache,target=/var/cache/uv --mount=type=bind,from=wheels,target=/wheels \
    if ls /wheels/torch-*.whl >/dev/null 2>&1; then torch="--find-links /wheels"; else torch="--torch-backend $TORCH"; fi \
 && /opt/uv/bin/uv pip install --quiet --python /opt/evergreen/bin/python --compile-bytecode $torch -r requirements.txt \
 # C++ headers, static libraries and packages' own tests: nothing here builds against or runs them.
 && cd /opt/evergreen/lib/python3.11/site-packages \
 && rm -rf torch/include torch/share torch/test torch/lib/*.a pyarrow/include pyarrow/tests pyarrow/src \
 && find . -path ./mlflow -prune -o -type d -name tests -path '*/*/tests' \
      \( -path './pandas/*' -o -path './scipy/*' -o -path './sklearn/*' -o -path './numpy/*' \) -prune -exec rm -rf {} +

# The command `evergreen`, and where its package lies; apart from the packages, so that a changed line costs a second.
FROM packages AS package
COPY pyproject.toml /srv/evergreen/
COPY include/evergreen/__init__.py /srv/evergreen/include/evergreen/
RUN --mount=type=cache,target=/var/cache/uv \
    /opt/uv/bin/uv pip install --quiet --python /opt/evergreen/bin/python --prefix /opt/package --no-deps -e /srv/evergreen

FROM ${PYTHON_IMAGE} AS evergreen
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/evergreen /opt/evergreen
COPY --from=package /opt/package /opt/evergreen
# The user's number is that of whoever owns the files in secrets/, who alone can read them.
ARG EVERGREEN_UID=10001
RUN useradd --uid "$EVERGREEN_UID" --user-group --create-home evergreen \
 && install --directory --owner=evergreen --mode=700 /var/lib/evergreen /var/lib/mlflow /var/lib/jobs /run/engine
COPY . /srv/evergreen
RUN /opt/evergreen/bin/python -m compileall -q /srv/evergreen/include
ENV PATH=/opt/evergreen/bin:$PATH PYTHONUNBUFFERED=1 LANG=C.UTF-8 \
    EVERGREEN_HOME=/var/lib/evergreen AIRFLOW_HOME=/var/lib/evergreen/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/srv/evergreen/dags AIRFLOW__CORE__PLUGINS_FOLDER=/srv/evergreen/plugins \
    XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /srv/evergreen
USER evergreen
CMD ["evergreen", "--help"]
# The git revision of these files, for the lineage of what they make.
ARG EVERGREEN_REVISION=
ENV EVERGREEN_REVISION=$EVERGREEN_REVISION

FROM ${PYTHON_IMAGE} AS store
RUN apt-get update && apt-get install --yes --no-install-recommends nginx-light fcgiwrap git openssl && rm -rf /var/lib/apt/lists/*
ARG EVERGREEN_UID=10001
RUN useradd --uid "$EVERGREEN_UID" --user-group --create-home evergreen \
 && install --directory --owner=evergreen --mode=700 /var/lib/store
COPY config/store /etc/store
USER evergreen
CMD ["sh", "/etc/store/start.sh"]
