{{/*
What the services have in common. A template takes a dict: root (the chart's own $), service ("gateway", "builder" or "executor"),
part (its values), name (of its objects), and for an executor pool (its name).
*/}}

{{- define "enginehouse.name" -}}
{{- $name := ternary .Release.Name (printf "%s-enginehouse" .Release.Name) (contains "enginehouse" .Release.Name) -}}
{{- $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{- define "enginehouse.selector" -}}
app.kubernetes.io/name: enginehouse
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .service }}
{{- with .pool }}
enginehouse.dev/pool: {{ . }}
{{- end }}
{{- end -}}

{{- define "enginehouse.labels" -}}
{{ include "enginehouse.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "enginehouse.port" -}}
{{- get (dict "gateway" "8400" "builder" "8401" "executor" "8411") .service -}}
{{- end -}}

{{- define "enginehouse.metricsPort" -}}
{{- get (dict "gateway" "9400" "builder" "9401" "executor" "9411") .service -}}
{{- end -}}

{{/* The image: one a target of deploy/docker/Dockerfile. */}}
{{- define "enginehouse.image" -}}
{{- $target := .service -}}
{{- if or (eq (.part.device | default "cpu") "cuda") (and (eq .service "builder") .part.gpus) -}}{{- $target = printf "%s-cuda" .service -}}{{- end -}}
{{- $image := .part.image | default (printf "%senginehouse-%s" .root.Values.image.prefix $target) -}}
{{- if contains "@" $image -}}{{ $image }}{{- else -}}{{ $image }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}{{- end -}}
{{- end -}}

{{/* Whether a service takes calls of everybody on its network: it does not start so without being told. */}}
{{- define "enginehouse.open" -}}
{{- $tls := get .root.Values.tls .service -}}
{{- if not (or (and $tls.secret $tls.mutual) (get .root.Values.apiKeys .service).secret) -}}
{{- if not (or .root.Values.networkPolicy.enabled .root.Values.insecure) -}}
{{- fail (printf "everybody on the cluster's network could command the %ss: set networkPolicy.enabled, tls.%s with mutual, apiKeys.%s, or insecure: true" .service .service .service) -}}
{{- end -}}
true
{{- end -}}
{{- end -}}

{{/* What a gateway needs to be let in by executors. */}}
{{- define "enginehouse.checkGateway" -}}
{{- if and .Values.tls.executor.secret .Values.tls.executor.mutual (not .Values.tls.gateway.secret) -}}
{{- fail "tls.executor.mutual: executors want a certificate of the gateway; give it one as tls.gateway.secret" -}}
{{- end -}}
{{- if and .Values.apiKeys.executor.secret (not .Values.apiKeys.ofGateway.secret) -}}
{{- fail "apiKeys.executor: executors want a key of the gateway; give it one as apiKeys.ofGateway.secret" -}}
{{- end -}}
{{- end -}}

{{/* How a port is spoken with, for meshes and gateways of Kubernetes, which need it for HTTP/2 without TLS. */}}
{{- define "enginehouse.protocol" -}}
{{- if not (get .root.Values.tls .service).secret }}, appProtocol: kubernetes.io/h2c{{ end -}}
{{- end -}}

{{/* What a service's command line has whatever it is; the image's entry point has --host. */}}
{{- define "enginehouse.args" -}}
- --store={{ required "store.url: where are the engines? s3://BUCKET/PREFIX, or a directory in store.claim" .root.Values.store.url }}
- --metrics-port={{ include "enginehouse.metricsPort" . }}
{{- if and (ne .service "gateway") (include "enginehouse.open" .) }}
- --insecure
{{- end }}
{{- range .part.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "enginehouse.env" -}}
- name: ENGINEHOUSE_LOG_FORMAT
  value: {{ .root.Values.logs.format }}
- name: ENGINEHOUSE_LOG_LEVEL
  value: {{ .root.Values.logs.level }}
{{- with .root.Values.store.credentials }}
{{- if .secret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .accessKey }}}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .secretKey }}}}
{{- end }}
{{- end }}
{{- with get .root.Values.tls .service }}
{{- if .secret }}
- {name: ENGINEHOUSE_TLS_CERT, value: /etc/enginehouse/tls/tls.crt}
- {name: ENGINEHOUSE_TLS_KEY, value: /etc/enginehouse/tls/tls.key}
{{- if .mutual }}
- {name: ENGINEHOUSE_TLS_CA, value: /etc/enginehouse/tls/ca.crt}
{{- end }}
{{- end }}
{{- end }}
{{- with get .root.Values.apiKeys .service }}
{{- if .secret }}
- {name: ENGINEHOUSE_API_KEYS, value: /etc/enginehouse/api-keys/{{ .key }}}
{{- end }}
{{- end }}
{{- if eq .service "gateway" }}
{{- with .root.Values.tls.executor }}
{{- if .secret }}
- {name: ENGINEHOUSE_EXECUTOR_TLS_CA, value: /etc/enginehouse/executor-ca/ca.crt}
{{- if .mutual }}
- {name: ENGINEHOUSE_EXECUTOR_TLS_CERT, value: /etc/enginehouse/tls/tls.crt}
- {name: ENGINEHOUSE_EXECUTOR_TLS_KEY, value: /etc/enginehouse/tls/tls.key}
{{- end }}
{{- end }}
{{- end }}
{{- with .root.Values.apiKeys.ofGateway }}
{{- if .secret }}
- {name: ENGINEHOUSE_EXECUTOR_API_KEY_FILE, value: /etc/enginehouse/executor-key/{{ .key }}}
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $value := .part.env }}
- name: {{ $name }}
  {{- if kindIs "map" $value }}
  valueFrom: {{ toJson $value }}
  {{- else }}
  value: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "enginehouse.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- with .root.Values.store }}
{{- if .claim }}
- {name: store, mountPath: {{ .url }}}
{{- end }}
{{- end }}
{{- if (get .root.Values.tls .service).secret }}
- {name: tls, mountPath: /etc/enginehouse/tls, readOnly: true}
{{- end }}
{{- if (get .root.Values.apiKeys .service).secret }}
- {name: api-keys, mountPath: /etc/enginehouse/api-keys, readOnly: true}
{{- end }}
{{- if eq .service "gateway" }}
{{- if .root.Values.tls.executor.secret }}
- {name: executor-ca, mountPath: /etc/enginehouse/executor-ca, readOnly: true}
{{- end }}
{{- if .root.Values.apiKeys.ofGateway.secret }}
- {name: executor-key, mountPath: /etc/enginehouse/executor-key, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{/* Secrets are mounted whole, so that what is renewed arrives; the services read it again. */}}
{{- define "enginehouse.volumes" -}}
- {name: tmp, emptyDir: {}}
{{- with .root.Values.store.claim }}
- {name: store, persistentVolumeClaim: {claimName: {{ . }}}}
{{- end }}
{{- with (get .root.Values.tls .service).secret }}
- {name: tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- with (get .root.Values.apiKeys .service).secret }}
- {name: api-keys, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- if eq .service "gateway" }}
{{- with .root.Values.tls.executor.secret }}
- {name: executor-ca, secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}}
{{- end }}
{{- with .root.Values.apiKeys.ofGateway.secret }}
- {name: executor-key, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Asks for the health of a name: as the node does it itself, or where TLS is spoken, which it cannot, with the image's own program. */}}
{{- define "enginehouse.check" -}}
{{- if (get .root.Values.tls .service).secret -}}
exec: {command: [python, -m, protos.probe, "127.0.0.1:{{ include "enginehouse.port" . }}", --service, {{ .health }}]}
timeoutSeconds: 5
{{- else -}}
grpc: {port: {{ include "enginehouse.port" . }}, service: {{ .health }}}
timeoutSeconds: 3
{{- end -}}
{{- end -}}

{{/*
Alive is a service whose event loop answers, also while it drains; ready is one that takes calls. One that has engines to load answers
when it has them: until then only the time that this may take counts. A probe that starts a program is asked half as often.
*/}}
{{- define "enginehouse.probes" -}}
{{- $period := ternary 5 10 (empty (get .root.Values.tls .service).secret) -}}
{{- $alive := include "enginehouse.check" (merge (dict "health" "alive") .) -}}
startupProbe:
  {{- $alive | nindent 2 }}
  periodSeconds: {{ $period }}
  failureThreshold: {{ div (mul (.part.startMinutes | default 2) 60) $period }}
livenessProbe:
  {{- $alive | nindent 2 }}
  periodSeconds: 15
  failureThreshold: 4
readinessProbe:
  {{- include "enginehouse.check" (merge (dict "health" (printf "enginehouse.v1.%s" (title .service))) .) | nindent 2 }}
  periodSeconds: {{ $period }}
  failureThreshold: 2
{{- end -}}

{{- define "enginehouse.container" -}}
name: {{ .service }}
image: {{ include "enginehouse.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{ include "enginehouse.probes" . }}
{{- end -}}

{{/* Where a pod may run, and as whom. */}}
{{- define "enginehouse.pod" -}}
serviceAccountName: {{ .root.Values.serviceAccount | default "default" }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with get $.part $key }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "enginehouse.disruption" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  labels: {{- include "enginehouse.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .part.maxUnavailable | default 1 }}
  selector:
    matchLabels: {{- include "enginehouse.selector" . | nindent 6 }}
{{- end -}}

{{- define "enginehouse.poolName" -}}
{{ include "enginehouse.name" .root }}-{{ .pool }}
{{- end -}}

{{/* A pool's values: those of all pools, but for what it says itself; of a map, key by key. */}}
{{- define "enginehouse.poolValues" -}}
{{- $values := deepCopy .root.Values.executorDefaults -}}
{{- range $key, $value := get .root.Values.executors .pool -}}
{{- if kindIs "map" $value -}}
{{- $merged := deepCopy (get $values $key | default dict) -}}
{{- range $inner, $own := $value -}}{{- $_ := set $merged $inner $own -}}{{- end -}}
{{- $value = $merged -}}
{{- end -}}
{{- $_ := set $values $key $value -}}
{{- end -}}
{{- toJson $values -}}
{{- end -}}
