{{/* Name of the operator's objects: the release's name, with the chart's when that isn't part of it. */}}
{{- define "stoker.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- printf "%s-operator" (.Release.Name | trunc 53 | trimSuffix "-") -}}
{{- else -}}
{{- printf "%s-%s-operator" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Cluster-wide objects carry the namespace too, so that two releases of one name don't meet. */}}
{{- define "stoker.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "stoker.fullname" .) -}}
{{- end -}}

{{- define "stoker.selectorLabels" -}}
app.kubernetes.io/name: stoker-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "stoker.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "stoker.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: stoker
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* Name of the routers' objects. */}}
{{- define "stoker.routerName" -}}
{{- include "stoker.fullname" . | trimSuffix "-operator" | trunc 56 | trimSuffix "-" }}-router
{{- end -}}

{{- define "stoker.routerSelectorLabels" -}}
app.kubernetes.io/name: stoker-router
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "stoker.routerLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "stoker.routerSelectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: stoker
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* Call with (dict "root" $ "repository" "stoker/operator"). */}}
{{- define "stoker.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- .repository }}:{{ default .root.Chart.AppVersion $image.tag -}}
{{- end -}}

{{/* What the operator may do where InferenceServices live. */}}
{{- define "stoker.rules" -}}
- apiGroups: [serving.stoker.dev]
  resources: [inferenceservices]
  verbs: [get, list, watch]
- apiGroups: [serving.stoker.dev]
  resources: [inferenceservices/status]
  verbs: [get, patch]
# Owned objects: applied, never deleted by hand; the garbage collector follows their owner.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [services, configmaps, serviceaccounts]
  verbs: [get, list, watch, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
# Where a Service leads. What Kubernetes made of its selector is removed when the router takes over.
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [endpoints]
  verbs: [get, delete]
{{- if and .Values.router.enabled .Values.router.apiKeys }}
# Keys of spec.access.apiKeySecret.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
{{- end }}
# Pods: read to see how they do; patched to say which one a scale-down should take.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, patch]
# To tell that a model's volume is missing.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end -}}
