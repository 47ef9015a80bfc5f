{{/* The name of the chart, for labels. */}}
{{- define "keywright.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* The prefix of every name. 50 characters, so that the longest suffix still fits a DNS label. */}}
{{- define "keywright.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels by which the operator's pods are selected. They can never change. */}}
{{- define "keywright.selectorLabels" -}}
app.kubernetes.io/name: {{ include "keywright.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{/* Labels of every object. */}}
{{- define "keywright.labels" -}}
app.kubernetes.io/name: {{ include "keywright.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: keywright
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "keywright.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "keywright.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: say which ServiceAccount to use, since serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The operator as the apiserver knows it. */}}
{{- define "keywright.username" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "keywright.serviceAccountName" . }}
{{- end }}

{{- define "keywright.image" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag }}
{{- if .Values.image.digest }}
{{- printf "%s:%s@%s" .Values.image.repository $tag .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository $tag }}
{{- end }}
{{- end }}

{{/*
A file of the chart as an object with the chart's labels, and kept on uninstall if asked. Call with a dict of root, file
and keep.
*/}}
{{- define "keywright.object" -}}
{{- $object := .root.Files.Get .file | fromYaml }}
{{- if not (hasKey $object "kind") }}
{{- fail (printf "%s: %s" .file (default "not a Kubernetes object" (get $object "Error"))) }}
{{- end }}
{{- $metadata := dict "labels" (include "keywright.labels" .root | fromYaml) }}
{{- if .keep }}
{{- $_ := set $metadata "annotations" (dict "helm.sh/resource-policy" "keep") }}
{{- end }}
{{- merge $object (dict "metadata" $metadata) | toYaml }}
{{- end }}

{{/*
Garbage collection and the namespace controller touch any object, and must not be held up. Nobody can be one of them but
those who run the control plane.
*/}}
{{- define "keywright.notAController" -}}
- name: not-garbage-collection
  expression: >-
    !(request.userInfo.username in ['system:serviceaccount:kube-system:generic-garbage-collector',
    'system:serviceaccount:kube-system:namespace-controller', 'system:kube-controller-manager'])
{{- end }}
