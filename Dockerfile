# The images of Stoker: targets `operator`, `server` and `router`.
#
#   docker build --target server -t stoker/server:0.1.0 .
#
# builds from source. Where the binaries are built already (tests/cluster/images.sh)
# BINARIES=prebuilt copies them from target/images/bin instead.
ARG RUST_IMAGE=rust:1.95-slim
ARG RUNTIME_IMAGE=debian:12-slim
ARG BINARIES=source

FROM ${RUST_IMAGE} AS source
WORKDIR /src
COPY . .
# The compiler of the CUDA kernels comes as Python packages (server/kernels/fetch-nvrtc.sh).
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv \
    && server/kernels/fetch-nvrtc.sh
RUN cargo build --release --locked -p stoker-operator -p stoker-server -p stoker-router \
    && mkdir /out \
    && strip -o /out/stoker-operator target/release/stoker-operator \
    && strip -o /out/stoker-server target/release/stoker-server \
    && strip -o /out/stoker-router target/release/stoker-router

FROM scratch AS prebuilt
COPY target/images/bin /out

FROM ${BINARIES} AS binaries

# A number, not a name: Kubernetes checks runAsNonRoot by it.
FROM ${RUNTIME_IMAGE} AS operator
COPY --from=binaries /out/stoker-operator /usr/local/bin/stoker-operator
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/stoker-operator"]

FROM ${RUNTIME_IMAGE} AS router
COPY --from=binaries /out/stoker-router /usr/local/bin/stoker-router
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/stoker-router"]

FROM ${RUNTIME_IMAGE} AS server
COPY --from=binaries /out/stoker-server /usr/local/bin/stoker-server
# Has NVIDIA's container runtime mount the driver's libcuda, which is opened at
# run time. Means nothing where there is no GPU.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/stoker-server"]
